package gcpiit

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"time"

	"github.com/hallmark-id/hallmark/attestors/cloud"
)

const (
	defaultEndpoint = "https://compute.googleapis.com"
	scope           = "https://www.googleapis.com/auth/compute.readonly"

	maxAnswer = 2 << 20 // bytes; all metadata of an instance have at most 512 KiB
	maxValues = 1000    // tags, and metadata, of an instance; Google has lower bounds
)

// compute asks the Compute Engine API about instances.
type compute struct {
	c      ServerConfig
	tokens *Tokens
	api    *cloud.Service
}

func newCompute(c ServerConfig, now func() time.Time) (*compute, error) {
	out := &compute{c: c, api: cloud.API()}
	var err error
	if out.c.Endpoint, err = cloud.CheckEndpoint(cmp.Or(c.Endpoint, defaultEndpoint)); err != nil {
		return nil, fmt.Errorf("endpoint: %w", err)
	}
	if out.tokens, err = NewTokens(scope, c.ServiceAccountFile, c.MetadataAddress, now); err != nil {
		return nil, err
	}
	return out, nil
}

// described is what the API says of an instance.
type described struct {
	ID     string `json:"id"`
	Name   string `json:"name"`
	Status string `json:"status"`
	Tags   struct {
		Items []string `json:"items"`
	} `json:"tags"`
	Labels   map[string]string `json:"labels"`
	Metadata struct {
		Items []struct {
			Key   string `json:"key"`
			Value string `json:"value"`
		} `json:"items"`
	} `json:"metadata"`
}

// describe returns selectors of a token's instance. The error is for the node if
// the instance is not what it should be, or else an [unavailable].
func (c *compute) describe(ctx context.Context, i *instance) ([]string, error) {
	token, err := c.tokens.Bearer(ctx)
	if err != nil {
		return nil, unavailable{err}
	}
	answer, err := c.api.Do(ctx, cloud.Question{
		URL: c.c.Endpoint + "/compute/v1/projects/" + url.PathEscape(i.ProjectID) + "/zones/" + url.PathEscape(i.Zone) +
			"/instances/" + url.PathEscape(i.Name) + "?fields=id,name,status,tags,labels,metadata",
		Header: map[string]string{"Authorization": "Bearer " + token}, Most: maxAnswer,
	})
	var status *cloud.StatusError
	if errors.As(err, &status) && status.Code == http.StatusNotFound {
		return nil, errors.New("instance is gone")
	}
	if err != nil {
		return nil, unavailable{fmt.Errorf("describe the instance %s: %w", i.Name, err)}
	}
	var d described
	if err := json.Unmarshal(answer.Body, &d); err != nil || d.ID == "" {
		return nil, unavailable{fmt.Errorf("describe the instance %s: the API answered with something else", i.Name)}
	}
	switch {
	case d.ID != i.ID || d.Name != i.Name:
		return nil, errors.New("instance is gone; another one has its name")
	case !slices.Contains([]string{"PROVISIONING", "STAGING", "RUNNING"}, d.Status):
		return nil, errors.New("instance is not running")
	case len(d.Tags.Items) > maxValues || len(d.Metadata.Items) > maxValues:
		return nil, unavailable{fmt.Errorf("instance %s has more than %d tags or metadata", i.Name, maxValues)}
	}
	return c.selectors(&d)
}

func (c *compute) selectors(d *described) ([]string, error) {
	var out []string
	for _, tag := range d.Tags.Items {
		out = append(out, "tag:"+tag)
	}
	for key, value := range d.Labels {
		if slices.Contains(c.c.AllowedLabelKeys, key) {
			out = append(out, "label:"+key+":"+value)
		}
	}
	for _, item := range d.Metadata.Items {
		if !slices.Contains(c.c.AllowedMetadataKeys, item.Key) {
			continue
		}
		if len(item.Value) > c.c.MaxMetadataValueSize {
			return nil, fmt.Errorf("metadata %q of the instance has %d bytes; the server's max_metadata_value_size is %d", item.Key, len(item.Value), c.c.MaxMetadataValueSize)
		}
		out = append(out, "metadata:"+item.Key+":"+item.Value)
	}
	return out, nil
}
