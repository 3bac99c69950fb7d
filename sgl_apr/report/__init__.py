"""What people look at: trees and tables of trajectories."""
