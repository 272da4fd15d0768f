"""What is read while a text is generated: as a caller asks for it (plan), and as a few numbers of each position
(readings)."""
