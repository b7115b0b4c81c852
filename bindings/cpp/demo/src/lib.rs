//! The main job in one command
