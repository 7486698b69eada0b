"""Results on disk → curves, tables and a page. Only reads results, and never imports torch."""
