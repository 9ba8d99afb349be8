"""Read videos: open containers, choose and decode frames, find shots; in a process of its own with limits."""
