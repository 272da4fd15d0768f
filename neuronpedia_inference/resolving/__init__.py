"""From plans of plain numbers to tensors at points, refusing what cannot be honoured before anything runs."""
