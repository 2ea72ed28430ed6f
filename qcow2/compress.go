package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/zstd"
)

// Compressed clusters hold one stream each: raw deflate with a window of 4 KiB
// (zlib), or a zstd frame. The last sector of a stream may end in bytes of
// another one, so both decoders stop at the cluster's size and look no further.
//
// Spec: qcow2 "Compressed Clusters Descriptor", "compression_type".

const (
	deflateWindow = 4096 // QEMU's decoder has no more
	// maxZstdWindow bounds what a frame may make the decoder allocate. Frames of
	// one cluster need no more than the largest cluster, 2 MiB; RFC 8878 asks
	// decoders to support 8 MiB.
	maxZstdWindow = 8 << 20
)

// Codecs are large and stateless between uses.
var (
	inflaters = sync.Pool{New: func() any { return &inflater{r: flate.NewReader(nil)} }}
	deflaters = sync.Pool{New: func() any { return newDeflater() }}
	unzstders = sync.Pool{New: func() any { return newUnzstder() }}
	zstders   = sync.Pool{New: func() any { return newZstder() }}
)

type inflater struct {
	src bytes.Reader
	r   io.ReadCloser
}

type deflater struct {
	dst boundedWriter
	w   *flate.Writer
}

type unzstder struct {
	src bytes.Reader
	r   *zstd.Decoder
}

type zstder struct {
	w   *zstd.Encoder
	buf []byte
}

func newDeflater() *deflater {
	w, err := flate.NewWriterWindow(io.Discard, deflateWindow)
	if err != nil {
		panic(err) // the window is a constant
	}
	return &deflater{w: w}
}

// newUnzstder returns a decoder that runs in the caller's goroutine and starts none.
func newUnzstder() *unzstder {
	r, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxWindow(maxZstdWindow))
	if err != nil {
		panic(err) // the options are constants
	}
	return &unzstder{r: r}
}

func newZstder() *zstder {
	w, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderCRC(false),
		zstd.WithSingleSegment(true))
	if err != nil {
		panic(err) // the options are constants
	}
	return &zstder{w: w}
}

// decompressCluster fills dst, one whole cluster, from the compressed data at
// the beginning of src. It is an error if src holds fewer bytes than that.
func decompressCluster(compressionType uint8, dst, src []byte) error {
	var err error
	switch compressionType {
	case compressionZlib:
		d := inflaters.Get().(*inflater)
		defer inflaters.Put(d)
		d.src.Reset(src)
		if err = d.r.(flate.Resetter).Reset(&d.src, nil); err == nil {
			_, err = io.ReadFull(d.r, dst)
		}
		d.src.Reset(nil)
	case compressionZstd:
		d := unzstders.Get().(*unzstder)
		defer unzstders.Put(d)
		d.src.Reset(src)
		if err = d.r.Reset(&d.src); err == nil {
			_, err = io.ReadFull(d.r, dst)
		}
		d.src.Reset(nil)
	default:
		return fmt.Errorf("%w: compression type %d", ErrUnsupported, compressionType)
	}
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF // the caller must not take it for the end of a file
	}
	return err
}

// compressCluster compresses the cluster src into dst and returns the bytes
// used. It reports false when they do not fit: then the cluster is better
// stored as it is.
func compressCluster(compressionType uint8, dst, src []byte) (n int, ok bool) {
	if compressionType == compressionZstd {
		c := zstders.Get().(*zstder)
		defer zstders.Put(c)
		c.buf = c.w.EncodeAll(src, c.buf[:0])
		if len(c.buf) > len(dst) {
			return 0, false
		}
		return copy(dst, c.buf), true
	}
	c := deflaters.Get().(*deflater)
	defer deflaters.Put(c)
	c.dst = boundedWriter{buf: dst}
	c.w.Reset(&c.dst)
	_, err := c.w.Write(src)
	err = errors.Join(err, c.w.Close())
	n = c.dst.n
	c.dst = boundedWriter{}
	return n, err == nil
}

// A boundedWriter fills a buffer and fails when it is full.
type boundedWriter struct {
	buf []byte
	n   int
}

func (w *boundedWriter) Write(p []byte) (int, error) {
	if len(p) > len(w.buf)-w.n {
		return 0, io.ErrShortBuffer
	}
	w.n += copy(w.buf[w.n:], p)
	return len(p), nil
}
