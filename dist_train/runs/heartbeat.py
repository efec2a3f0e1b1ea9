"""How often a run shows that it lives, and how long it must be quiet to mean something. All in seconds.

The heartbeat is the time in status.json, so that each write of that file is one. While ranks train or evaluate, they
write it every EVERY_S, give or take their agreement (a second, or one longer step); while they compile a step or wait
for a data set, nobody does. So the longer the silence, the more may be concluded from it.
"""

AT_MOST_EVERY_S = 1.0  # unless the state changes; a write takes a third of a millisecond, as much as half a small step
EVERY_S = 5.0
LATE_S = 2 * EVERY_S  # look whether its process is still there: if not, it is KILLED
GONE_S = 6 * EVERY_S  # another machine's run, whose processes cannot be seen: a machine that joins stops waiting for it
SILENT_S = 24 * EVERY_S  # longer than most steps compile: shown as SILENT
