"""What daily use needs running on one machine: MLflow's server, Prefect's, and a worker.

Started, watched and stopped as processes and asked over HTTP; neither package is imported here.
"""
