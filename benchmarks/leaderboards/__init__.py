"""A leaderboard for each environment: learners beside every baseline and the bound, on test data."""
