"""Evaluation of whole models: on clean and corrupted images, calibrated and not, with their time, energy and memory."""
