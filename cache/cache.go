package cache

// File is what the cache reads tables from and writes them back to.
type File interface {
	ReadAt(p []byte, off int64) (int, error)
	WriteAt(p []byte, off int64) (int, error)
	Datasync() error
}

// Cache is the metadata cache of a process.
type Cache struct{}
