"""What a run costs in memory and time, and making it fit a card. May know families and levers, by their shapes."""
