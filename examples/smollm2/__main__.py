from examples.smollm2.recipe import main

main()
