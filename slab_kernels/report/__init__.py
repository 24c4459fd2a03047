"""Results as tables, pictures and one HTML page.

measurements    files of measurements, read and checked
results         what was read: the records `Report` and `Result`
plain           files of which nothing is known but names and numbers, as tables
headline        what was found, in plain words
tables          results and timings as rows of text
figures, speed  the pictures, of models and of speed
stacks          stacked bars: parts of a decode step and of a folder
style           colours and sizes of a picture
page            the HTML page; stylesheet holds its CSS
write           all of it as files
"""
