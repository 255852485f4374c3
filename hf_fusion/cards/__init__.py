"""Model cards: facts about a fused model, rendered by templates."""
