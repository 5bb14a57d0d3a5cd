"""The same loss on an SDXL pipeline: few-step text-to-image students (needs
the extra packages of `latent` in pyproject.toml).

sdxl        the adapter: a pipeline as denoisers, with LoRAs on one shared UNet
scheduler   the students' sampler for stock diffusers pipelines
recipes     six methods as data: phases one after the other
states      where the noisy latents of a phase come from
scorer      how well does an image fit its caption
objectives  adversary, distribution matching, preference
distil      training a student, phase by phase
shapes      a drawn world of captioned images, and an exact reader of them
tiny_sdxl   a real SDXL pipeline of tiny size, trained from scratch
"""
