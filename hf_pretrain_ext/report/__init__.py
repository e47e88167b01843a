"""What people read: plots made from what happened in a run. Needs the extra `report` (matplotlib)."""
