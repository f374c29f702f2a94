"""What trained models and policies are worth, against the simulator and each other: tables and pictures."""
