# SPDX-License-Identifier: Apache-2.0
"""What would stop a run on several hosts, found before it starts: `python -m merit_ds.preflight RECIPE`.

facts.py      run on each host, it prints what that host has, as one JSON
meeting.py    the hosts meet at the master's port meanwhile: is it reachable, is `run.save` shared, do the clocks agree
hosts.py      the hostfile, and collecting the facts over ssh
judge.py      every host's facts against the recipe and against one another: no I/O, so it judges facts from anywhere
"""
