def test_x(tiny_model, tiny_folder):
    print(tiny_model, tiny_folder)
