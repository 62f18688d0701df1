package authority_test

import (
	"errors"
	"testing"
	"time"

	"github.com/hallmark-id/hallmark/server/authority"
	"github.com/hallmark-id/hallmark/server/registry"
)

// readers are those who read what is published: they know what was published until
// a time.
type readers struct {
	from      time.Time // when they know authorities
	err       error     // why they do not
	overtaken []string  // that sign without being known, by ID
}

func (r *readers) Ready(*registry.Authority) (time.Time, error) { return r.from, r.err }

func (r *readers) Overtaken(a *registry.Authority, _ error) { r.overtaken = append(r.overtaken, a.ID) }

func (r *readers) option(o *authority.Options) { o.Publication = r }

func TestAnAuthorityThatIsNotPublishedYetDoesNotSignUntilItIs(t *testing.T) {
	for _, kind := range everyKind {
		w, who := newWorld(t), &readers{err: errors.New("the bucket is gone")}
		a := w.open(who.option)
		first, _, _ := a.State(kind)
		at := func(age time.Duration) time.Time {
			t.Helper()
			w.add(first.CreatedAt.Add(age).Sub(w.time()))
			return w.rotate(a)
		}
		if len(who.overtaken) != 0 {
			t.Errorf("%s: the first one of a server, which nobody can know, is complained about", kind)
		}
		at(12 * time.Hour)
		next := at(20 * time.Hour) // usually it would sign now
		if w.signing(a, kind) != first.ID {
			t.Fatalf("%s: an authority signs that is not published", kind)
		}
		if wait := next.Sub(w.time()); wait <= 0 || wait > time.Minute {
			t.Errorf("%s: it is looked at again after %v", kind, wait)
		}
		if n := w.log.count("the next authority does not sign yet"); n != len(everyKind) {
			t.Errorf("%s: the log says %d times that it waits", kind, n)
		}
		// It is published, and readers keep what they have for some minutes.
		who.err, who.from = nil, w.time().Add(5*time.Minute)
		if next := at(20*time.Hour + time.Second); w.signing(a, kind) != first.ID || !next.Equal(who.from) {
			t.Errorf("%s: it signs while readers may have what was there before; next is %v", kind, next)
		}
		at(20*time.Hour + 5*time.Minute + time.Second)
		if w.signing(a, kind) == first.ID || len(who.overtaken) != 0 {
			t.Errorf("%s: it does not sign, or is complained about, now that it is known", kind)
		}
	}
}

func TestAnAuthorityThatIsNeverPublishedSignsBeforeNothingDoes(t *testing.T) {
	for _, kind := range everyKind {
		w, who := newWorld(t), &readers{err: errors.New("the bucket is gone")}
		a := w.open(who.option)
		first, _, _ := a.State(kind)
		at := func(age time.Duration) {
			t.Helper()
			w.add(first.CreatedAt.Add(age).Sub(w.time()))
			w.rotate(a)
		}
		at(12 * time.Hour)
		at(22*time.Hour - time.Second)
		if w.signing(a, kind) != first.ID {
			t.Fatalf("%s: it signs too early", kind)
		}
		at(22 * time.Hour) // a twelfth is left, in which SVIDs have their usual life
		if w.signing(a, kind) == first.ID {
			t.Fatalf("%s: the former one signs until it ends", kind)
		}
		if len(who.overtaken) != len(everyKind) {
			t.Errorf("%s: %d are said to be unknown", kind, len(who.overtaken))
		}
	}
}

func TestOnDemandAnAuthorityThatIsNotPublishedSignsAndThatIsSaid(t *testing.T) {
	w, who := newWorld(t), &readers{err: errors.New("the bucket is gone")}
	a := w.open(who.option)
	next, err := a.Prepare(t.Context(), registry.JWT)
	if err == nil {
		_, err = a.Activate(t.Context(), registry.JWT, next.ID)
	}
	if err != nil {
		t.Fatal(err)
	}
	if w.signing(a, registry.JWT) != next.ID || len(who.overtaken) != 1 || who.overtaken[0] != next.ID {
		t.Errorf("%s signs, %q are said to be unknown", w.signing(a, registry.JWT), who.overtaken)
	}
}
