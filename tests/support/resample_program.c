/* Resize crops by resample.h without Python, so that it can be tried on other processors.
 *
 * Standard input: int32 width, height, tile_size, num_crops; int32 boxes[num_crops][6] as in `resize_crops`; pixels of
 * 4 bytes. Standard output: the tiles.
 */
#include <stdio.h>

#include "resample.h"

static int read_all(void *data, size_t size, size_t count) { return fread(data, size, count, stdin) == count; }

static int read_crop(Crop *crop) {
    int32_t box[6];
    if (!read_all(box, sizeof(box), 1)) return 0;
    *crop = (Crop){.left = box[0], .top = box[1], .right = box[2], .bottom = box[3], .width = box[4], .height = box[5]};
    return 1;
}

int main(void) {
    int32_t sizes[4];
    if (!read_all(sizes, sizeof(sizes), 1)) return 2;
    Job job = {.width = sizes[0], .height = sizes[1], .tile_size = sizes[2], .num_crops = sizes[3]};
    const size_t num_pixels = (size_t)job.width * job.height;
    const size_t tiles_bytes = (size_t)job.num_crops * 3 * job.tile_size * job.tile_size;
    uint8_t *pixels = malloc(4 * num_pixels);
    job.tiles = calloc(tiles_bytes, 1);
    if (!pixels || !job.tiles || !start_job(&job)) return 1;
    for (ptrdiff_t i = 0; i < job.num_crops; i++)
        if (!read_crop(&job.crops[i])) return 2;
    if (!read_all(pixels, 4, num_pixels)) return 2;
    const int done = add_rows(&job, pixels, 0, job.height) && fwrite(job.tiles, 1, tiles_bytes, stdout) == tiles_bytes;
    free_job(&job);
    free(job.tiles);
    free(pixels);
    return !done;
}
