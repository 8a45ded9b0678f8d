"""What a result file begins with, in tests."""

HEADER = {"commit": "c0ffee", "dirty": False, "sources": "c0de", "quick": False, "ceilings": {}, "machine": {
    "device": "cpu", "name": "a processor", "cpu": "a processor", "threads": 2, "torch": "2.13.0"}}  # fmt: skip
