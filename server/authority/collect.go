package authority

import (
	"errors"
	"slices"
	"time"

	"go.step.sm/crypto/kms/apiv1"

	"github.com/hallmark-id/hallmark/server/kms"
)

const (
	// collectAfter is how much older than the longest life of an authority a key
	// must be that is deleted because no authority has it.
	collectAfter = 24 * time.Hour
	collectEvery = 24 * time.Hour // a look
	collectRetry = 5 * time.Minute
)

// lister is a key manager that says which keys it has.
type lister interface{ Keys() ([]kms.Key, error) }

// collect deletes keys that no authority has: what a crash between making a key
// and publishing it leaves, or a deletion that failed. In a key service they cost
// money.
//
// It does so only once they are older than an authority lives. A server that was
// restored from a backup beside the one that is running, or one of the same name,
// takes the other's keys for such: none that is in use is as old as that.
func (a *Authorities) collect() {
	keys, ok := a.keys.(lister)
	now := a.now()
	if !ok || now.Before(a.collectAt) {
		return
	}
	a.collectAt = now.Add(collectEvery)
	all, err := keys.Keys()
	if err != nil {
		a.log.Warn("cannot list the keys to find those that no authority has; will try again", "error", err)
		a.collectAt = now.Add(collectRetry)
		return
	}
	var life time.Duration
	for _, p := range a.plans {
		life = max(life, p.lifetime)
	}
	wanted := a.wanted()
	for _, k := range all {
		if slices.Contains(wanted, k.Name) {
			continue
		}
		if due := k.Created.Add(life + collectAfter); now.Before(due) {
			if due.Before(a.collectAt) {
				a.collectAt = due
			}
			continue
		}
		err := a.keys.(apiv1.KeyDeleter).DeleteKey(&apiv1.DeleteKeyRequest{Name: k.Name})
		if err != nil && !errors.Is(err, apiv1.NotFoundError{}) {
			a.log.Warn("cannot delete a key that no authority has; will try again", "key", k.Name, "error", err)
			a.collectAt = now.Add(collectRetry)
			continue
		}
		a.log.Info("key deleted that no authority has", "key", k.Name, "created", k.Created)
	}
}

// wanted returns the names of this server's keys that are in use or will be.
func (a *Authorities) wanted() (names []string) {
	for _, r := range a.registry.View().Authorities() {
		if r.Server == a.server {
			names = append(names, r.KeyName)
		}
	}
	for _, k := range a.spare {
		names = append(names, k.name)
	}
	return names
}
