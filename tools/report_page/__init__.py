"""The page that ``python -m tools report`` writes: one module and one template for each section, and the frame around them.

============================  ======================================================================================
``page.py``, ``page.html.j2``  the frame: title, navigation, sections, and what is missing; everything is put into one file
``page.css``, ``page.js``      look, and the little that moves: the theme switch and the slice viewer
``scores.*``                   Dice and other metrics, from the folder that ``evaluate`` wrote
``slices.*``                   slices with label maps over them, from the same folder and the images
``agreement.*``                how much the task vectors agree, from the vectors
``coefficients.*``             the coefficients that were tried, from the folder that ``search`` wrote
``landscape.*``                loss around and between the models, from the folder that ``flatness`` wrote
``lineage.*``                  recipe and parents, from the bundle's metadata
``charts.py``                  line charts, heat maps and contours as SVG
``colours.py``                 palettes that colour-blind people can tell apart
============================  ======================================================================================

A section's module reads and computes, its template says how that looks. Templates escape all that they are given; names in
metadata are written by strangers.
"""
