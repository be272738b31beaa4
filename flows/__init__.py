"""Verbs: thin Prefect flows over `endoprint.jobs`."""
