"""How the embedded tiny family was pretrained, and what its model card reports."""
