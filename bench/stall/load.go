package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"time"
)

// writeBytes is the size of a write.
const writeBytes = 4096

// A client is an NBD connection that has one write under way at a time.
type client struct {
	conn   net.Conn
	buf    []byte // header of a request, 28 bytes, and its data
	cookie uint64
}

// Constants of the protocol. Spec: NBD proto.md "Fixed newstyle negotiation",
// "Request message", "Simple reply message".
const (
	nbdMagic         = 0x4e42444d41474943
	nbdOptionMagic   = 0x49484156454f5054
	nbdExportName    = 1
	nbdClientFlags   = 3 // fixed newstyle, no zeroes
	nbdRequestMagic  = 0x25609513
	nbdReplyMagic    = 0x67446698
	nbdWrite         = 1
	nbdRequestHeader = 28
)

// newClient negotiates the unnamed export with the shortest handshake there is.
func newClient(conn net.Conn) (*client, error) {
	c := &client{conn: conn, buf: make([]byte, nbdRequestHeader+writeBytes)}
	var hello [18]byte
	if _, err := io.ReadFull(conn, hello[:]); err != nil {
		return nil, err
	}
	if binary.BigEndian.Uint64(hello[0:]) != nbdMagic || binary.BigEndian.Uint64(hello[8:]) != nbdOptionMagic {
		return nil, errors.New("not an NBD server")
	}
	var option [20]byte
	binary.BigEndian.PutUint32(option[0:], nbdClientFlags)
	binary.BigEndian.PutUint64(option[4:], nbdOptionMagic)
	binary.BigEndian.PutUint32(option[12:], nbdExportName)
	if _, err := conn.Write(option[:]); err != nil {
		return nil, err
	}
	var export [10]byte // size and flags
	_, err := io.ReadFull(conn, export[:])
	return c, err
}

// write writes writeBytes at off and waits for the reply.
func (c *client) write(off int64) error {
	c.cookie++
	b := c.buf
	binary.BigEndian.PutUint32(b[0:], nbdRequestMagic)
	binary.BigEndian.PutUint16(b[4:], 0)
	binary.BigEndian.PutUint16(b[6:], nbdWrite)
	binary.BigEndian.PutUint64(b[8:], c.cookie)
	binary.BigEndian.PutUint64(b[16:], uint64(off))
	binary.BigEndian.PutUint32(b[24:], writeBytes)
	if _, err := c.conn.Write(b); err != nil {
		return err
	}
	var reply [16]byte
	if _, err := io.ReadFull(c.conn, reply[:]); err != nil {
		return err
	}
	if binary.BigEndian.Uint32(reply[0:]) != nbdReplyMagic || binary.BigEndian.Uint64(reply[8:]) != c.cookie {
		return errors.New("not a reply to the request")
	}
	if code := binary.BigEndian.Uint32(reply[4:]); code != 0 {
		return fmt.Errorf("write at %#x: NBD error %d", off, code)
	}
	return nil
}

// A load is a number of clients that write at random to a set of places.
type load struct {
	clients []*client
	places  []int64 // offsets; few enough for the host memory that they take, once copied
	pause   time.Duration
}

// newPlaces spreads n places of an image of size bytes evenly, so that together
// they need all of its tables.
func newPlaces(size int64, n int) []int64 {
	places := make([]int64, n)
	step := size / int64(n) &^ (writeBytes - 1)
	for i := range places {
		places[i] = int64(i) * step
	}
	return places
}

// run writes for d, and returns how long the writes took. during runs meanwhile,
// after lead.
func (l *load) run(ctx context.Context, d, lead time.Duration, during func() error) (*histogram, error) {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	h := &histogram{}
	errs := make([]error, len(l.clients)+1)
	var wg sync.WaitGroup
	for i, c := range l.clients {
		wg.Go(func() {
			for ctx.Err() == nil && errs[i] == nil {
				begin := time.Now()
				errs[i] = c.write(l.places[rand.IntN(len(l.places))])
				h.add(time.Since(begin))
				if l.pause > 0 {
					time.Sleep(l.pause)
				}
			}
		})
	}
	if during != nil {
		time.Sleep(lead)
		errs[len(l.clients)] = during()
	}
	wg.Wait()
	return h, errors.Join(errs...)
}
