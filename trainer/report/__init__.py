"""A run as one self-contained HTML page: `python -m trainer.report RUN_FOLDER`."""
