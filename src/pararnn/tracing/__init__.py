"""From a cell's step to graphs, structure and derivatives; knows no backend and no cell."""
