"""The dashboard: runs, models and a server in the browser."""
