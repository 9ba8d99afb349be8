"""Cut videos into rows before a run: find their shots and windows in a stage of its own, and list the parts."""
