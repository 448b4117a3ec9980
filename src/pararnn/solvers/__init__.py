"""Multiple-shooting Newton; knows no backend and no cell."""
