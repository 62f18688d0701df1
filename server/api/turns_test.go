package api_test

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hallmark-id/hallmark/server/api"
)

func TestHandshakesTakeTurnsInTheOrderTheyCame(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begin := api.NewTurns(1)
		end, err := begin(t.Context())
		must(t, err)
		var order []int
		for i := range 3 {
			go func() {
				end, err := begin(t.Context())
				if err != nil {
					t.Error(err)
					return
				}
				order = append(order, i)
				end()
			}()
			synctest.Wait()
		}
		end()
		synctest.Wait()
		if len(order) != 3 || order[0] != 0 || order[1] != 1 || order[2] != 2 {
			t.Errorf("turns were taken in the order %v", order)
		}
	})
}

func TestAHandshakeThatWouldComeTooLateIsNotBegun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begin := api.NewTurns(1)
		end, err := begin(t.Context())
		must(t, err)
		came := time.Now()
		if _, err := begin(t.Context()); err == nil || time.Since(came) != 5*time.Second {
			t.Errorf("got %v after %v", err, time.Since(came))
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := begin(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("a handshake that was given up got %v", err)
		}
		end()
		_, err = begin(t.Context())
		must(t, err)
	})
}

// hello is what a client of TLS says first.
type hello struct {
	net.Conn
	said []byte
}

func (h *hello) Write(b []byte) (int, error)    { h.said = append(h.said, b...); return len(b), nil }
func (*hello) Read([]byte) (int, error)         { return 0, errors.New("no answer") }
func (*hello) SetDeadline(time.Time) error      { return nil }
func (*hello) SetWriteDeadline(time.Time) error { return nil }
func (*hello) Close() error                     { return nil }

func TestHandshakesThatStandStillHoldUpNobody(t *testing.T) {
	w := newWorld(t)
	c := w.tlsConfig(nil)
	c.NextProtos = []string{"h2"}
	h := &hello{}
	if err := tls.Client(h, c).Handshake(); err == nil || len(h.said) == 0 {
		t.Fatalf("no hello: %v", err)
	}
	for i := range 200 {
		conn, err := net.Dial("tcp", w.address)
		must(t, err)
		defer conn.Close()
		switch i % 3 { // nothing, a part, all but the end
		case 1:
			_, err = conn.Write(h.said[:10])
		case 2:
			_, err = conn.Write(h.said)
		}
		must(t, err)
	}
	w.serves()
}
