package feed

import (
	"context"
	"fmt"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/hallmark-id/hallmark/pkg/digest"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
	"github.com/hallmark-id/hallmark/server/store"
)

// writer cuts a change into messages of a bounded size and sends them.
type writer struct {
	ctx      context.Context // of the stream
	stream   Stream
	running  *sync.WaitGroup            // goroutines that send
	admitted func() error               // asked before each message: the agent may leave the one before unread for long
	servers  func() *hallmarkv1.Servers // asked for the last message of a change

	complete bool                 // the next message begins a complete set
	defaults *hallmarkv1.Defaults // for the next message

	message *hallmarkv1.FollowResponse
	size    int // bytes of message, about
}

func (w *writer) entry(e *hallmarkv1.Entry) error {
	if err := w.room(proto.Size(e)); err != nil {
		return err
	}
	w.message.Entries = append(w.message.Entries, e)
	return nil
}

func (w *writer) goneEntry(id string) error {
	if err := w.room(len(id)); err != nil {
		return err
	}
	w.message.GoneEntries = append(w.message.GoneEntries, id)
	return nil
}

func (w *writer) bundle(b *hallmarkv1.Bundle) error {
	if err := w.room(proto.Size(b)); err != nil {
		return err
	}
	w.message.Bundles = append(w.message.Bundles, b)
	return nil
}

func (w *writer) goneBundle(name string) error {
	if err := w.room(len(name)); err != nil {
		return err
	}
	w.message.GoneBundles = append(w.message.GoneBundles, name)
	return nil
}

func (w *writer) crl(c *hallmarkv1.CRL) error {
	if err := w.room(proto.Size(c)); err != nil {
		return err
	}
	w.message.Crls = append(w.message.Crls, c)
	return nil
}

func (w *writer) goneCRL(authority string) error {
	if err := w.room(len(authority)); err != nil {
		return err
	}
	w.message.GoneCrls = append(w.message.GoneCrls, authority)
	return nil
}

func (w *writer) revokedTokens(l *hallmarkv1.RevokedTokens) error {
	if err := w.room(proto.Size(l)); err != nil {
		return err
	}
	w.message.RevokedTokens = append(w.message.RevokedTokens, l)
	return nil
}

func (w *writer) goneRevokedTokens(list string) error {
	if err := w.room(len(list)); err != nil {
		return err
	}
	w.message.GoneRevokedTokens = append(w.message.GoneRevokedTokens, list)
	return nil
}

// room sends the message off, with more to follow, if a part of a size would
// make it too large.
func (w *writer) room(size int) error {
	const framing = 8 // bytes of tag and length
	if w.size > 0 && w.size+size+framing > maxMessage {
		w.message.More = true
		if err := w.send(); err != nil {
			return err
		}
	}
	w.size += size + framing
	return nil
}

// finish sends the last message of a change.
func (w *writer) finish(rev store.Revision, sum digest.Sum) error {
	w.message.Revision = int64(rev)
	w.message.Digest = sum[:]
	w.message.Servers = w.servers()
	return w.send()
}

// beat sends a message that changes nothing.
func (w *writer) beat(rev store.Revision, sum digest.Sum) error { return w.finish(rev, sum) }

// send sends the message. It waits for the agent to have room for it, but no
// longer than SendTimeout; the stream has to end after an error.
func (w *writer) send() error {
	m := w.message
	m.Complete, m.Defaults = w.complete, w.defaults
	w.complete, w.defaults = false, nil
	w.message, w.size = &hallmarkv1.FollowResponse{}, 0
	if err := w.admitted(); err != nil {
		return err
	}
	// On a goroutine that lasts as long as the sending: streams are many, and
	// most of them idle.
	sent := make(chan error, 1)
	w.running.Go(func() { sent <- w.stream.Send(m) })
	timeout := time.NewTimer(SendTimeout)
	defer timeout.Stop()
	select {
	case err := <-sent:
		return err
	case <-timeout.C:
		return fmt.Errorf("%w: it left a message unread for %v", ErrSlow, SendTimeout)
	case <-w.ctx.Done():
		return context.Cause(w.ctx)
	}
}
