"""A leaderboard for each environment: learners beside every yardstick and the bound, on test data."""
