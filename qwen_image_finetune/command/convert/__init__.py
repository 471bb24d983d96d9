"""`qif convert`: the project of another trainer as a configuration of ours; what becomes of each key is said."""
