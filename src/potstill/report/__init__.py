"""How numbers are shown: tables, figures, sentences and the page; nothing here measures."""
