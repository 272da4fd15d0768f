"""The Modal service: the only code that imports modal, and the only code that is deployed beside the library."""
