"""`python -m neuronpedia_inference`"""

from neuronpedia_inference.cli import main

if __name__ == "__main__":
    main()
