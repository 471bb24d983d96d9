"""What a person types: `qif`, one verb a function. The top floor: may know every room, and none knows it."""
