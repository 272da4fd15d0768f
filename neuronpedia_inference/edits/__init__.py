"""Edits of what passes through the model: as callers ask for them (plan), where (select), as numbers (table)."""
