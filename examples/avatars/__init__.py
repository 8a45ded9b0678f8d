"""A class-conditional VAR of avatars in colour: trained here, shipped with its weights and its judge."""
