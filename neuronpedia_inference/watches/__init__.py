"""What is read while a text is generated: as a caller asks for it (plan), as a few numbers of each position (readings),
and with the weights for it (resolve)."""
