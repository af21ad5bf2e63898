"""The demo: strategies side by side on one picture or clip, in a browser. `vtprune demo` or `python demo/app.py`."""
