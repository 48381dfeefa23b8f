"""What a trained model costs and how it is made cheap: it is handed modules and knows no model, data or loop."""
