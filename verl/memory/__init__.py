"""Where memory goes: the estimate before a run, the settings that save some, offloading, and what a lack of it says."""
