"""What a run will be and cost, before it starts: choices that fit, time, warnings, and the page that says so.

Imports core and the closed forms of models; needs no torch, no GPU and no shards.
"""
