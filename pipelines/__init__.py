"""The pipeline: Prefect walks the graph that DVC defines. Nothing else in Genus imports Prefect."""
