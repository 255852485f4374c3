"""The small trained experts that hf_fusion's demo uses: folders of files, no code."""
