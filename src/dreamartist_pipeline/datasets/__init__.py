"""The few custom Kedro datasets."""
