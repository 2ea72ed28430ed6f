// Package cache is a writeback cache of metadata tables, shared by all images
// of a process.
package cache
