"""A segment table's columns and pattern codes, in Python. In C++ csrc/segment.h names them."""

COLUMNS = ("dst", "src", "span", "keep", "first", "pattern")
# A grid is written as `start` segments, one for each row that stays.
PATTERN_CODES = {"start": 0, "center": 1, "linspace": 2, "grid": 0}
