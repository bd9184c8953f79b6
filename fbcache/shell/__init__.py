"""The commands that look into tracked directories: ``ls``, ``info``, ``verify``, ``export``, ``gc``."""
